"""Compute a run's constants in this process; one that hangs at a point of it is made to be killed."""

import json
import sys
import time
from pathlib import Path

from conftest import host_trainer


def main(config: str, point: str = "") -> None:
    """Hang at the nth table's `score` or in the middle of its `write`, or say at last how many there were of each."""
    trainer = host_trainer(json.loads(Path(config).read_text()))
    from axolotl_mopo.training import modpo
    from axolotl_mopo.training.precompute import Precomputation
    from axolotl_mopo.training.table_cache import TableCache

    counts = {"score": 0, "write": 0}

    def reach(what):
        here = f"{what} {counts[what]}"
        counts[what] += 1
        return here == point

    def hang():
        print(f"hanging at {point}", flush=True)
        time.sleep(600)

    class Hanging(Precomputation):
        def _over_ranks(self, title, rows, score):
            return hang() if reach("score") else super()._over_ranks(title, rows, score)

    class HangingCache(TableCache):
        def _write(self, name, values):
            if reach("write"):
                (self.folder / f".{name}.safetensors.1.part").write_bytes(b"half of a fi")
                hang()
            super()._write(name, values)

    modpo.Precomputation, modpo.TableCache = Hanging, HangingCache
    trainer.precompute(trainer.model)
    print(json.dumps(counts), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
