"""A tiny CogVideoX 1.0 checkpoint in the layout of ``zai-org/CogVideoX-5b`` (``variant="1.0-2b"``: of ``-2b``)."""

from __future__ import annotations

import functools

from tests.checkpoints import cogvideox

write = functools.partial(cogvideox.write, variant="1.0-5b")
