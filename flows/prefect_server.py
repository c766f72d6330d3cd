"""A Prefect API for one run, where none is configured: a server process of our own that ends with this one.

Prefect starts such a server by itself, but leaves it behind when the run is killed; thirty killed runs would hold six
gigabytes. This one watches its parent. Its database is Prefect's own (~/.prefect), so runs can be looked at later with
`prefect server start`.
"""

import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

STARTUP_SECONDS = 120.0


@contextmanager
def prefect_api() -> Iterator[None]:
    """Prefect calls inside go to the configured API, or else to a server that lives as long as the context."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    if PREFECT_API_URL.value():
        yield
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-m", "flows.prefect_server", str(port), str(os.getpid())])
    try:
        url = f"http://127.0.0.1:{port}/api"
        _wait(server, f"{url}/health")
        with temporary_settings({PREFECT_API_URL: url}):
            yield
    finally:
        for handler in logging.getLogger("prefect.flow_runs").handlers:
            handler.flush()  # log lines on their way to the API
        server.terminate()
        server.wait()


def _wait(server: "subprocess.Popen[bytes]", health: str) -> None:
    import httpx

    from storage.errors import ShardError

    patience = time.monotonic() + STARTUP_SECONDS
    with httpx.Client() as client:
        while server.poll() is None and time.monotonic() < patience:
            try:
                if client.get(health).status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.1)
    raise ShardError(f"the Prefect server did not answer within {STARTUP_SECONDS:.0f} s")


def _serve(port: int, parent: int) -> None:
    import uvicorn

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()
    # What Prefect sets for the temporary server that it starts itself.
    os.environ |= {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
    uvicorn.run("prefect.server.api.server:create_app", factory=True, host="127.0.0.1", port=port, log_level="error")


if __name__ == "__main__":
    _serve(int(sys.argv[1]), int(sys.argv[2]))
