"""The Gluon kernels compile for a Hopper GPU, without one; what they compute is tested on one (test_executors.py)."""

import pytest

COMPILE = """
from draftbench.kernels import gluon_forward as kernels
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

def described(dtype, *box):
    return f"tensordesc<{dtype}{list(box)},{gl.NVMMASharedLayout(128, 16, rank=len(box))!r}>"

dtype, dim, box, half, cut, running, flagged, loose = CASE
signature = dict(zip(("q", "k", "v", "out"), ((half, 64), (box, 128), (box, 128), (half, 64))))
video = {f"{name}_video": described(dtype, 1, *part, 64) for name, (part, _) in signature.items()}
text = {f"{name}_text": described(dtype, 1, rows, 64) for name, (_, rows) in signature.items()}
pointers = dict.fromkeys(("ROWS", "COUNTS", "WHOLE", "BLOCKS", "STARTS", "TAKEN", "AGAIN"), "*i32")
names = "items heads q_blocks capacity length T Y X s_b s_h o_b o_h"
numbers = dict.fromkeys(names.split(), "i32")
fixed = dict(BOX=box, CUT=cut, HALF=half, D=dim, STAGES=3, RUNNING=running, FLAGGED=flagged, LOOSE=loose, ORDERED=loose)
source = GluonASTSource(
    kernels.attention,
    {**video, **text, "OUT": "*" + dtype, "LSE": "*fp32", **pointers, "ORDER": "*i64", "scale": "fp32", **numbers,
     **dict.fromkeys(fixed, "constexpr")},
    fixed,
)
made = triton.compile(source, target=HOPPER, options=dict(num_warps=4, maxnreg=168))
assert made.metadata.shared <= 227 * 1024, made.metadata.shared
assert made.asm["ptx"].count("wgmma.mma_async") > 0 and "setmaxnreg" in made.asm["ptx"]
print("compiled", len(made.asm["cubin"]))
"""


@pytest.mark.parametrize(
    "case",
    [
        ("bf16", 128, (1, 8, 16), (1, 4, 16), (False, True, False), False, False, False),
        ("fp16", 64, (2, 8, 8), (1, 8, 8), (True, True, True), True, False, False),
        ("bf16", 64, (1, 1, 128), (1, 1, 64), (False, False, False), True, True, False),
        ("bf16", 128, (1, 1, 128), (1, 1, 64), (False, False, False), False, False, True),
    ],
    ids=["8x16", "2x8x8", "as_they_come", "loose"],
)
def test_it_compiles(case, compiled_alone):
    compiled_alone(COMPILE.replace("CASE", repr(case)))
