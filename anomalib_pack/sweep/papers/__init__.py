"""The tables of the papers, published and measured: ``anomalib sweep --config papers/ulsad/table_22``.

From the outside in::

    command.py    runs what is missing in the store, prints the tables
    files.py      where the files are, and what they say
    settings.py   what a table may say: rows, columns, what each cell is, the published numbers
    store.py      which runs there are, and which tables need what of them
    cells.py      mean over seeds of a cell, its difference to the published number
    report.py     tables on the console, as Markdown and as CSV
    costs.py      cells that `anomalib efficiency` measures
    rehearsal.py  the dry run
"""
