"""The Ray Serve example with two CPU replicas; only where Ray is installed."""

from __future__ import annotations

import importlib.util
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(290),
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray[serve] is not installed"),
]


def test_two_replicas_share_the_requests_and_give_the_same_text() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    known = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "examples/ray_serve/app.py", "--port", str(port)]
    done = subprocess.run(
        command, cwd=ROOT, env=known, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    found = re.search(r"requests by replica: \[(\d+), (\d+)\]; the same text from each: (\w+)", done.stdout)
    assert found is not None, done.stdout
    assert int(found[1]) + int(found[2]) == 8
    assert min(int(found[1]), int(found[2])) >= 1
    assert found[3] == "True"
