"""Products in e4m3 by cuBLASLt, with all that its epilogue can do beside them; PyTorch's own call of it has no place for a
residual, for GELU or for a result in e4m3.

The library is the one that PyTorch has loaded, called by its C interface: https://docs.nvidia.com/cuda/cublas/#using-the-cublaslt-api
"""

import ctypes
import threading
from ctypes import POINTER, byref, c_float, c_int, c_int8, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .attention import E4M3

if TYPE_CHECKING:
    from .product import Weights

LIBRARIES = ("libcublasLt.so.13", "libcublasLt.so.12")
WORKSPACE = 32 << 20  # bytes, what PyTorch takes on such devices
# cudaDataType, cublasComputeType, cublasOperation, cublasLtEpilogue
TYPES = {torch.bfloat16: 14, E4M3: 28}
FLOAT32, COMPUTE_FLOAT32, TRANSPOSED, PLAIN, BIAS, GELU = 0, 68, 1, 1, 4, 32
# cublasLtMatmulDescAttributes
TRANSPOSE_A, EPILOGUE, BIAS_POINTER, SCALE_A, SCALE_B, SCALE_D, FAST_ACCUMULATION, BIAS_TYPE = 3, 7, 8, 17, 18, 20, 25, 26
MAX_WORKSPACE = 1  # cublasLtMatmulPreferenceAttributes


class Heuristic(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t"""

    _fields_ = (
        ("algorithm", c_uint64 * 8),
        ("workspace", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


@lru_cache
def library() -> Any:
    """The library with its functions' types, or None."""
    for name in LIBRARIES:
        try:
            lib = ctypes.CDLL(name)
        except OSError:
            continue
        handle = c_void_p
        signatures = {
            "Create": [POINTER(handle)],
            "MatmulDescCreate": [POINTER(handle), c_int, c_int],
            "MatmulDescSetAttribute": [handle, c_int, c_void_p, c_size_t],
            "MatrixLayoutCreate": [POINTER(handle), c_int, c_uint64, c_uint64, c_int64],
            "MatmulPreferenceCreate": [POINTER(handle)],
            "MatmulPreferenceSetAttribute": [handle, c_int, c_void_p, c_size_t],
            "MatmulPreferenceDestroy": [handle],
            "MatmulAlgoGetHeuristic": [handle] * 7 + [c_int, POINTER(Heuristic), POINTER(c_int)],
            "Matmul": [handle, handle, c_void_p, c_void_p, handle, c_void_p, handle, c_void_p, c_void_p, handle, c_void_p, handle]
            + [c_void_p, c_void_p, c_size_t, c_void_p],
        }
        for function, types in signatures.items():
            getattr(lib, f"cublasLt{function}").argtypes = types
        return lib
    return None


def call(function: str, *arguments: Any) -> None:
    """Raises RuntimeError with the function and its status."""
    status = getattr(library(), f"cublasLt{function}")(*arguments)
    if status:
        raise RuntimeError(f"cublasLt{function}: status {status}")


def made(function: str, *arguments: Any) -> c_void_p:
    """A new object of the library."""
    handle = c_void_p()
    call(function, byref(handle), *arguments)
    return handle


class Kind(NamedTuple):
    """What products differ in that one plan is not for: (rows, inner) @ (columns, inner)^T, and what is beside it."""

    device: int
    rows: int
    columns: int
    inner: int
    out: torch.dtype
    gelu: bool
    bias: bool
    residual: bool


class Plan:
    """A product of a kind, and the algorithm that the library recommends for it: always the same, so results are too.

    The library's matrices are columns first, so it computes out^T = weight x^T, and sees the weight transposed.
    """

    def __init__(self, kind: Kind):
        self.lock, self.handle = threading.Lock(), handle_of(kind.device)
        self.product = made("MatmulDescCreate", COMPUTE_FLOAT32, FLOAT32)
        self.set(TRANSPOSE_A, c_int32(TRANSPOSED))
        self.set(EPILOGUE, c_uint32((GELU if kind.gelu else 0) | (BIAS if kind.bias else 0) or PLAIN))
        self.set(FAST_ACCUMULATION, c_int8(1))  # sums in the tensor cores' precision, as in our own kernel
        if kind.bias:
            self.set(BIAS_TYPE, c_int32(TYPES[torch.bfloat16]))
            self.set(BIAS_POINTER, c_void_p(16))  # any: that there is one decides on the algorithm
        self.weight = made("MatrixLayoutCreate", TYPES[E4M3], kind.inner, kind.columns, kind.inner)
        self.x = made("MatrixLayoutCreate", TYPES[E4M3], kind.inner, kind.rows, kind.inner)
        self.added = made("MatrixLayoutCreate", TYPES[torch.bfloat16], kind.columns, kind.rows, kind.columns)
        self.out = made("MatrixLayoutCreate", TYPES[kind.out], kind.columns, kind.rows, kind.columns)
        self.one, self.beta = c_float(1), c_float(1 if kind.residual else 0)
        preference = made("MatmulPreferenceCreate")
        call("MatmulPreferenceSetAttribute", preference, MAX_WORKSPACE, byref(c_size_t(WORKSPACE)), ctypes.sizeof(c_size_t))
        self.best, found = Heuristic(), c_int()
        layouts = (self.weight, self.x, self.added, self.out)
        call("MatmulAlgoGetHeuristic", self.handle, self.product, *layouts, preference, 1, byref(self.best), byref(found))
        call("MatmulPreferenceDestroy", preference)
        if found.value < 1 or self.best.state:
            raise RuntimeError(f"cublasLtMatmulAlgoGetHeuristic: nothing for {kind}")

    def set(self, attribute: int, value: Any) -> None:
        call("MatmulDescSetAttribute", self.product, attribute, byref(value), ctypes.sizeof(value))

    def __call__(self, pointers: dict[int, int], x: int, weight: int, added: int, out: int, workspace: int, stream: int) -> None:
        """Addresses of device memory; `pointers`: of what the attributes of the product name."""
        with self.lock:
            for attribute, address in pointers.items():
                self.set(attribute, c_void_p(address))
            operands = (byref(self.one), weight, self.weight, x, self.x, byref(self.beta), added, self.added, out, self.out)
            algorithm = byref(self.best.algorithm)
            call("Matmul", self.handle, self.product, *operands, algorithm, workspace, WORKSPACE, stream)


@lru_cache
def handle_of(device: int) -> c_void_p:
    with torch.cuda.device(device):
        return made("Create")


@lru_cache(maxsize=1024)
def plan_of(kind: Kind) -> Plan | None:
    """None where the library has no algorithm for it."""
    try:
        return Plan(kind)
    except RuntimeError:
        return None


@lru_cache(maxsize=8)
def workspace_of(device: torch.device, stream: int) -> Tensor:
    """Memory for the calls on one stream, which come one after the other."""
    return torch.empty(WORKSPACE, dtype=torch.uint8, device=device)


def available(device: torch.device) -> bool:
    """Whether the library is there, and the device has products in e4m3."""
    return device.type == "cuda" and library() is not None and torch.cuda.get_device_capability(device) >= (8, 9)


def kind_of(x: Tensor, weight: Tensor, gelu: bool, bias: bool, residual: bool, out: torch.dtype) -> Kind:
    return Kind(x.get_device(), len(x), weight.shape[0], weight.shape[1], out, gelu, bias, residual)


def product(
    x: Tensor,
    weights: "Weights",
    gelu: bool,
    bias: bool,
    residual: Tensor | None,
    out: Tensor,
    out_inverse: Tensor | None,
) -> None:
    """Fill `out` (M, N) with x (M, K) times the weight (N, K) transposed and what stands behind it; see `product.product`.

    Args:
        bias: whether to add it.
        residual: bfloat16 (M, N), added to the product; may be `out`.
        out_inverse: one-element float32 tensor: what a result in e4m3 is stored multiplied by.

    Raises: RuntimeError with the status of the library, or for a product of which `plan_of` knows none.
    """
    weight, scales = weights.weight, (weights.weight_scale, weights.input_scale)
    plan = plan_of(kind_of(x, weight, gelu, bias, residual is not None, out.dtype))
    if plan is None or scales[0] is None or scales[1] is None:
        raise RuntimeError("cublas: no algorithm for this product")
    pointers = {SCALE_A: scales[0].data_ptr(), SCALE_B: scales[1].data_ptr()}
    if bias:
        pointers[BIAS_POINTER] = weights.bias.data_ptr()
    if out_inverse is not None:
        pointers[SCALE_D] = out_inverse.data_ptr()
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream().cuda_stream
        # what is allocated during a capture is the graph's own
        make = workspace_of.__wrapped__ if torch.cuda.is_current_stream_capturing() else workspace_of
        workspace = make(x.device, stream)
        added = 0 if residual is None else residual.data_ptr()
        plan(pointers, x.data_ptr(), weight.data_ptr(), added, out.data_ptr(), workspace.data_ptr(), stream)
