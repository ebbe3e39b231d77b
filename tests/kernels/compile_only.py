"""Compile Triton kernels for a GPU that is not there: do they compile, and how many registers do they need?

For other tests::

    sys.path.insert(0, str(Path(__file__).parent))
    from compile_only import compiled

    kernels = compiled("import torch; from vlm.kernels.my_op.triton_forward import forward; forward(torch.zeros(...))")
    assert not any(kernel.spilled for kernel in kernels if kernel.name == "forward_kernel")

The program is Python text that calls *our own launch function* with CPU tensors, as a GPU run would (below the
dispatch, which refuses a CPU). It runs in a process of its own without the interpreter, where Triton takes the device
for an sm_90 GPU: every launch compiles to machine code, with the types, strides and sizes that it is given, and then
launches nothing. So results are uninitialised memory; the program must not look at them. Two to ten seconds a kernel.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

CAPABILITY = 90  # H100, H200


class Kernel(NamedTuple):
    """A compiled kernel: registers per thread and bytes of stack per thread (not 0: registers were spilled)."""

    name: str
    registers: int
    stack: int
    shared: int
    warps: int

    @property
    def spilled(self) -> bool:
        return self.stack > 0


def compiled(program: str) -> list[Kernel]:
    """The kernels that ``program`` launches, each once. Raises AssertionError with what went wrong."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", __file__]
    done = subprocess.run(command, input=program, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
    return [Kernel(*row) for row in json.loads(done.stdout.splitlines()[-1])]


def _main() -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    class NoDevice:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", CAPABILITY, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int | None = None) -> int:
            return 0

    run, found = JITFunction.run, {}

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in found:
            registers, stack = _resources(Path(triton.__file__).parent, kernel.asm["cubin"])
            found[kernel.hash] = Kernel(
                self.__name__, registers, stack, kernel.metadata.shared, kernel.metadata.num_warps
            )
        return kernel

    driver.set_active(NoDevice())
    JITFunction.run = compile_only
    exec(compile(sys.stdin.read(), "program", "exec"), {})
    print(json.dumps(list(found.values())))


def _resources(package: Path, binary: bytes) -> tuple[int, int]:
    """(registers, stack bytes) per thread, by the disassembler that comes with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [package / "backends" / "nvidia" / "bin" / "cuobjdump", "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = dict(word.split(":") for word in text.split() if word.count(":") == 1 and not word.endswith(":"))
    return int(usage["REG"]), int(usage["STACK"])


if __name__ == "__main__":
    _main()
