"""The tables of the papers, published and measured: ``anomalib sweep --config papers/ulsad/table_22``.

From the outside in::

    command.py     runs what the store lacks, prints the tables
    files.py       where the files are
    settings.py    what a table may say: rows, columns, what each cell is, the published numbers
    store.py       which jobs the tables need, and what of each
    cells.py       mean over seeds of a cell, its difference to the published number
    costs.py       cells that `anomalib efficiency` measures
    report.py      tables on the console, as Markdown and as CSV
"""
