"""Run several programs one after the other in one process, which saves imports and the start of CUDA.

    python experiments/in_turn.py runs/ended.txt "train_dit/train.py --config tiny" "eval/generation.py --images ..."

Each runs as if started alone: with its own arguments, and with the memory of the one before freed. If one fails or is
stopped, the rest is not run. The file lists finished programs: the same command again runs the others. On SIGTERM a
training saves and stops; a program that cannot save is finished, and no further one starts.
"""

import gc
import runpy
import shlex
import signal
import sys
from pathlib import Path

import torch

from vtp_diffusion.runtime.programs import ROOT


def start_anew() -> None:
    """Free what the last program held, and undo what it set for the whole process."""
    from accelerate.state import AcceleratorState

    gc.collect()
    torch.cuda.empty_cache()
    torch.set_float32_matmul_precision("highest")
    AcceleratorState._reset_state(reset_partial_state=True)


def main(argv: list[str] | None = None) -> None:
    file, *lines = sys.argv[1:] if argv is None else argv
    ended = Path(file).read_text(encoding="utf-8").splitlines() if Path(file).is_file() else []
    told: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))  # training has its own meanwhile
    for line in lines:
        if told:
            raise SystemExit("stopped by a signal: the same command goes on with the next program")
        if line in ended:
            continue
        sys.argv = shlex.split(line)
        runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
        start_anew()
        with Path(file).open("a", encoding="utf-8") as stream:
            print(line, file=stream)


if __name__ == "__main__":
    main()
