"""The token goes to the Hub and nowhere else: not into the log, a page, a file."""

import json

import pytest

from tests.reliability.conftest import TOKEN
from tests.reliability.models import flux2

pytestmark = pytest.mark.server


def test_no_log_page_or_file_holds_the_token(server):
    failed = server.run(flux2(seed=1, model_id="nobody/gated"))
    assert failed.error is not None
    assert "HF_HUB_OFFLINE" in failed.error["exception_message"]
    assert server.run(flux2(seed=1)).succeeded
    pages = ["/system_stats", "/history", "/tpu-monitor/sample", "/object_info", "/queue"]
    shown = json.dumps([server.get(page) for page in pages]) + json.dumps(failed.events) + server.log()
    assert TOKEN not in shown
    small = [path for path in server.base.rglob("*") if path.is_file() and path.stat().st_size < 2**24]
    assert [path for path in small if TOKEN.encode() in path.read_bytes()] == []
