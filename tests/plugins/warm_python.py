"""Runs snippets in forks of one process, so that each starts fresh but does not spend seconds on importing torch.

Reads lines `{"code": ..., "argv": [...]}` and answers each with a line `{"code": ..., "out": ..., "err": ...}`. Nothing
of Anomalib or of its plugins is imported before the fork.
"""

import contextlib
import json
import os
import sys
import tempfile
import traceback

PRELOADED = (
    "torch", "torchvision.transforms.v2", "torchmetrics", "lightning.pytorch.cli", "timm", "jsonargparse", "omegaconf",
    "pandas", "matplotlib.pyplot", "sklearn.model_selection", "rich.traceback", "rich_argparse", "docstring_parser",
    "cv2", "kornia", "openvino", "open_clip", "FrEIA.framework", "onnx", "tifffile", "einops", "skimage",
)  # fmt: skip


def run(request: dict) -> int:
    """Run the code as the main program would."""
    sys.argv = ["python", *request["argv"]]
    try:
        exec(compile(request["code"], "<snippet>", "exec"), {"__name__": "__main__"})
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        sys.stderr.write(f"{error.code}\n")
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def serve() -> None:
    """Answer requests until standard input ends."""
    for line in sys.stdin:
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            child = os.fork()
            if child == 0:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                code = run(json.loads(line))
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            out.seek(0)
            err.seek(0)
            sys.stdout.write(json.dumps({"code": code, "out": out.read(), "err": err.read()}) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    for name in PRELOADED:
        with contextlib.suppress(ImportError):  # not all of these are dependencies of Anomalib in every version
            __import__(name)
    assert not [name for name in sys.modules if name.split(".")[0] == "anomalib"]
    serve()
