"""Compile Triton kernels for GPUs that are not here, and read what the machine code costs.

A class's kernel.py lists BUILDS. `python -m kernels.aot [NAME...]` prints a line for each and
target: a change that doubles the instructions per weight shows on a machine without a GPU.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

TARGETS = (80, 90, 100)  # A100, H100 and H200, B200
SLACK = 1.1  # of a budget: another version of the compiler is no regression
SPILLS = ("LDL", "STL")
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes a block may have; more: no launch


@dataclass(frozen=True)
class Build:
    """One compilation of a Triton kernel, and what its code must look like on sm_90."""

    name: str
    kernel: Any  # what @triton.jit made
    types: Mapping[str, str]  # argument -> "*fp16", "i32"; those left out are constants
    constants: Mapping[str, object]
    warps: int = 4
    stages: int = 3
    divisible: tuple[str, ...] = ()  # whole numbers known to be multiples of 16, as pointers are
    per_pass: int = 0  # weights (or elements) that a block takes in one pass of its longest loop
    budget: float = 0.0  # instructions per weight and lane; 0 where bandwidth is not the limit
    spills: int = 0  # loads and stores of spilled registers that are put up with
    tensor_core: str = ""  # what its multiply must be, such as "HMMA|HGMMA"
    targets: tuple[int, ...] = TARGETS


@dataclass(frozen=True)
class Code:
    """Machine code of a build: its instructions and those of its longest loop."""

    instructions: tuple[str, ...]
    loop: tuple[str, ...]
    shared_bytes: int = 0  # of shared memory that a block takes

    def count(self, *names: str) -> int:
        """How many instructions begin with one of these names."""
        return sum(opcode(i).split(".")[0] in names for i in self.instructions)

    @property
    def spills(self) -> int:
        """Loads and stores of what did not fit into registers."""
        return self.count(*SPILLS)

    @property
    def wide_loads(self) -> int:
        """Loads of 16 bytes a lane from memory, those past the registers included."""
        loads = [opcode(i) for i in self.loop or self.instructions]
        return sum(i.startswith(("LDGSTS", "LDG")) and ".128" in i for i in loads)

    def multiplies(self, pattern: str) -> int:
        """Tensor-core instructions whose name matches."""
        return sum(bool(re.match(pattern, opcode(i))) for i in self.instructions)

    def per_weight(self, build: Build) -> float:
        """Instructions of the loop for each weight, over all lanes; of the whole without a loop."""
        return len(self.loop or self.instructions) * 32 * build.warps / build.per_pass


def faults(build: Build, code: Code, capability: int) -> list[str]:
    """What is wrong with the code, each in one sentence; [] if nothing is."""
    found = []
    if code.spills > build.spills:
        found.append(f"{code.spills} loads and stores of spilled registers")
    if code.shared_bytes > SHARED[capability]:
        found.append(f"{code.shared_bytes} bytes of shared memory, {SHARED[capability]} there are")
    if build.tensor_core and not code.multiplies(build.tensor_core):
        found.append(f"no tensor-core instruction {build.tensor_core}")
    if build.per_pass and not code.wide_loads:
        found.append("no 16-byte load in its loop")
    if build.budget and capability == 90 and code.per_weight(build) > SLACK * build.budget:
        spent = code.per_weight(build)
        found.append(f"{spent:.2f} instructions per weight, {build.budget} with a tenth allowed")
    return found


@lru_cache(maxsize=512)
def compiled(build_key: tuple[str, str], capability: int) -> Code:
    """(class, name of a build) -> its code for compute capability 80, 90 or 100."""
    build = builds(build_key[0])[build_key[1]]
    kernel = compile_for(build, capability)
    code = disassembled(bytes(kernel.asm["cubin"]))
    return replace(code, shared_bytes=kernel.metadata.shared)


def compile_for(build: Build, capability: int) -> Any:
    """Triton's CompiledKernel; no driver and no GPU are needed."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = build.kernel.arg_names
    aligned = [n for n, t in build.types.items() if t.startswith("*") or n in build.divisible]
    source = ASTSource(
        fn=build.kernel,
        signature={n: build.types.get(n, "constexpr") for n in names},
        constexprs={(names.index(n),): value for n, value in build.constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    options = {"num_warps": build.warps, "num_stages": build.stages}
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=options)


def disassembled(binary: bytes) -> Code:
    """A cubin -> its instructions, by the disassembler in Triton's wheel."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin", delete=False) as file:
        file.write(binary)
    try:
        done = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True)
    finally:
        os.unlink(file.name)
    return read_code(done.stdout)


def read_code(text: str) -> Code:
    """What the disassembler prints -> its instructions."""
    labels: dict[str, int] = {}
    code: list[str] = []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            code.append(found[1].strip())
    return Code(tuple(code), longest_loop(code, labels))


def longest_loop(code: Sequence[str], labels: Mapping[str, int]) -> tuple[str, ...]:
    """The instructions of the longest loop, in order; its head is the only way in.

    So what waits past the end of a program and jumps back into its middle makes no loop of both.
    """
    after = [successors(code, labels, at) for at in range(len(code))]
    before: list[list[int]] = [[] for _ in code]
    for at, following in enumerate(after):
        for other in following:
            before[other].append(at)
    best: set[int] = set()
    for at, following in enumerate(after):
        head = min(following, default=at + 1)
        if head <= at and at not in reached(after, 0, past=head):
            best = max(best, reached(before, at, past=head) | {head}, key=len)
    return tuple(code[at] for at in sorted(best)) if len(best) > 1 else ()


def successors(code: Sequence[str], labels: Mapping[str, int], at: int) -> list[int]:
    """Where the program can be after instruction `at`."""
    name, target = opcode(code[at]), re.search(r"\(?(\.L_x_\d+)", code[at])
    found = [labels[target[1]]] if name.startswith("BRA") and target else []
    ends = not code[at].startswith("@") and (name == "EXIT" or re.match(r"BRA\s+`", code[at]))
    return found if ends or at + 1 == len(code) else [*found, at + 1]


def reached(ways: Sequence[Sequence[int]], start: int, past: int) -> set[int]:
    """Instructions on any way from `start` that does not lead through `past`."""
    seen: set[int] = set()
    todo = [start]
    while todo:
        at = todo.pop()
        if at not in seen and at != past:
            seen.add(at)
            todo += ways[at]
    return seen


def opcode(instruction: str) -> str:
    """Such as "@!P0 LDG.E.128 R4, [R2]" -> "LDG.E.128"."""
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0]


def builds(name: str) -> dict[str, Build]:
    """The builds of kernels/<name>/kernel.py by name."""
    return {b.name: b for b in importlib.import_module(f"kernels.{name}.kernel").BUILDS}


def compiled_classes() -> Iterator[str]:
    """Every folder of kernels/ with a kernel.py, hence with BUILDS."""
    root = Path(__file__).parent
    for module in pkgutil.iter_modules([str(root)]):
        if module.ispkg and (root / module.name / "kernel.py").exists():
            yield module.name


def main(names: list[str]) -> int:
    """Print every build of the named classes, of all if none is named -> how many are faulty."""
    faulty = 0
    for name in names or compiled_classes():
        for build in builds(name).values():
            for capability in build.targets:
                code = compiled((name, build.name), capability)
                what = "weight" if code.loop else "element"  # without a loop nothing is multiplied
                spent = f"{code.per_weight(build):5.2f} per {what}" if build.per_pass else ""
                wrong = "; ".join(faults(build, code, capability))
                faulty += bool(wrong)
                print(
                    f"sm_{capability} {name} {build.name:<24} {spent} {wrong or 'ok'}", flush=True
                )
    return faulty


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
