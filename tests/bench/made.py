"""Schedules made by hand, so that their cycles can be counted by hand."""

from __future__ import annotations

import itertools

from comfyui_tpu.plan.bundles import Schedule, parse

BRANCH = 5  # the bundle of a branch and the four behind it, which run either way


class Made:
    """Builds the text of a schedule out of pieces, each a list of bundles: mark, instructions, regions that start."""

    def __init__(self):
        self._names = itertools.count(1)

    def plain(self, bundles: int, instruction: str = "%1 = vst") -> list[list[str]]:
        return [["", instruction, ""] for _ in range(bundles)]

    def loop(self, body: list[list[str]], trips: int | None) -> list[list[str]]:
        """``body`` and ``BRANCH`` bundles more; runs ``trips`` times, None: as often as a register says."""
        name, bound = next(self._names), f"%s{trips}_s9" if trips is None else trips
        first = ["LB", f"%s{name}_s1 = sadd.s32 1, %s{name}_s2", f"Start region {name}"]
        test = f"%p{name}_p1 = scmp.ge.s32.totalorder %s{name}_s1, {bound}"
        back = ["", f"{test}  ;;  %7 = sbr.rel (!%p{name}_p1) target = $region{name}", ""]
        return [first, *body[1:], back, *self.plain(BRANCH - 1)]

    def branch(self, body: list[list[str]]) -> list[list[str]]:
        """``BRANCH`` bundles, ``body`` that may be skipped, and the one that is jumped to."""
        name = next(self._names)
        forward = ["", f"%8 = sbr.rel (%p{name}_p1) target = $region{name}", ""]
        return [forward, *self.plain(BRANCH - 1), *body, ["PF", "%9 = vst", f"Start/End empty region {name}"]]

    def schedule(self, pieces: list[list[str]]) -> Schedule:
        lines = [
            f"{hex(at):>6} {mark or '  '}: > {{ {instruction} }}" + (f" /* {region} */" if region else "")
            for at, (mark, instruction, region) in enumerate(pieces)
        ]
        used = [f"{int('vpow2' in instruction)} 0" for _, instruction, _ in pieces]
        return parse("\n".join(lines), "\n".join(["== CAPACTIY:", "EUP, MXU", "1 2", "== UTILIZATION:", *used]))
