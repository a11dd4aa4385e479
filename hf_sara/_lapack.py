"""Leading eigenpairs of a symmetric matrix, by LAPACK's own steps, with the interpreter lock released.

`scipy.linalg.eigh(subset_by_index=...)` does the same, but it has to be told the number of eigenvectors before
the eigenvalues are known, and it holds the interpreter lock, so that two matrices never run side by side. SciPy
publishes its LAPACK as function pointers (`scipy.linalg.cython_lapack`), which ctypes calls without the lock.
"""

import ctypes
from collections.abc import Callable

import numpy as np
from scipy.linalg import cython_lapack

_capsule_name = ctypes.pythonapi.PyCapsule_GetName
_capsule_name.restype, _capsule_name.argtypes = ctypes.c_char_p, [ctypes.py_object]
_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype, _capsule_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def _routine(name: str) -> Callable[..., None]:
    capsule = cython_lapack.__pyx_capi__[name]
    signature = _capsule_name(capsule)
    address = _capsule_pointer(capsule, signature)
    # The capsule's name is the routine's C signature, which lists one pointer for each argument.
    function = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * (signature.count(b",") + 1))(address)

    def call(*args: np.ndarray | int | float | bytes) -> None:
        # Fortran takes everything by address. The last argument is always the returned status.
        held = [argument if isinstance(argument, np.ndarray) else _boxed(argument) for argument in args]
        status = ctypes.c_int(0)
        pointers = [a.ctypes.data if isinstance(a, np.ndarray) else ctypes.addressof(a) for a in held]
        function(*pointers, ctypes.addressof(status))
        if status.value != 0:
            raise np.linalg.LinAlgError(f"LAPACK's {name} failed with status {status.value}.")

    return call


def _boxed(value: int | float | bytes) -> ctypes._SimpleCData:
    if isinstance(value, bytes):
        return ctypes.c_char(value)
    return ctypes.c_int(value) if isinstance(value, int) else ctypes.c_double(value)


_sytrd, _sterf, _stemr, _ormtr = (_routine(name) for name in ("dsytrd", "dsterf", "dstemr", "dormtr"))


def leading_eigenpairs(matrix: np.ndarray, choose: Callable[[np.ndarray], int]) -> tuple[np.ndarray, np.ndarray]:
    """
    All eigenvalues of a symmetric matrix, and as many leading eigenvectors as `choose` asks for.

    Args:
        matrix (`np.ndarray` of shape `(n, n)`): Symmetric, float64, C-contiguous. It is overwritten.
        choose (`Callable`): Gets the n eigenvalues in descending order and returns the number of eigenvectors.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: the eigenvalues (n) in descending order, and the chosen eigenvectors as the
        rows of a matrix (count, n), in the same order.
    """
    n = matrix.shape[0]
    if n == 1:
        choose(matrix[0].copy())
        return matrix[0].copy(), np.ones((1, 1))
    # A symmetric matrix is the same whether it is read by rows or by columns, so C order needs no transposed copy.
    diagonal, off_diagonal, tau = np.empty(n), np.empty(n), np.empty(n)
    work = np.empty(64 * n)
    _sytrd(b"L", n, matrix, n, diagonal, off_diagonal, tau, work, work.size)
    ascending, scratch = diagonal.copy(), off_diagonal.copy()
    _sterf(n, ascending, scratch)
    values = ascending[::-1].copy()
    count = choose(values)
    found, blocks = np.zeros(1, dtype=np.intc), np.empty(2 * n, dtype=np.intc)
    vectors, sink = np.empty((count, n)), np.empty(n)
    work, integers = np.empty(max(18 * n, 64 * n)), np.empty(10 * n, dtype=np.intc)
    try_relative_accuracy = np.ones(1, dtype=np.intc)
    _stemr(
        *(b"V", b"I", n, diagonal, off_diagonal, 0.0, 0.0, n - count + 1, n, found, sink, vectors, n, count, blocks),
        *(try_relative_accuracy, work, work.size, integers, integers.size),
    )
    _ormtr(b"L", b"L", b"N", n, count, matrix, n, tau, vectors, n, work, work.size)
    return values, vectors[::-1].copy()
