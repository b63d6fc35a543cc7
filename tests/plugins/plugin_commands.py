"""Commands as code for :class:`WarmPython`, which takes their arguments."""

import sysconfig
from pathlib import Path

ANOMALIB = (
    f"import runpy; runpy.run_path({str(Path(sysconfig.get_path('scripts')) / 'anomalib')!r}, run_name='__main__')"
)
# `python -m anomalib_pack`
TABLE = "import runpy; runpy.run_module('anomalib_pack', run_name='__main__', alter_sys=True)"
