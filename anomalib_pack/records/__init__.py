"""Records of a test or prediction: a row per image, a row per defect, and the metrics.

Files of a run, and who writes them::

    write_records.py    the callback, which sees a batch before and after the post-processor, and after the pictures
    recorder.py         the records of a run
    rows.py             what is known of an image -> a row
    thresholds.py       from which score on an image is anomalous
    defects.py          a mask and a map -> defects, with plain arrays
    table.py            rows -> files, batch by batch
    coco.py             defects -> one file for labelling tools
"""

from anomalib_pack.records.defects import Defect, find_defects
from anomalib_pack.records.write_records import WriteRecords

__all__ = ["Defect", "WriteRecords", "find_defects"]
