"""Servers on loopback that a data set can be downloaded from."""

import contextlib
import http.server
import threading


class Mirror:
    """A server on loopback. ``broken`` names the files whose connection breaks in the middle, once
    each; it resumes a download if ``resumes``."""

    def __init__(self, files, broken=(), resumes=True):
        self.asked, self.broken = [], set(broken)
        mirror = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                name, wanted = self.path.lstrip("/"), self.headers.get("Range")
                mirror.asked.append((name, wanted))
                content = files.get(name)
                if content is None:
                    self.send_error(404)
                    return
                begin = int(wanted[6:-1]) if wanted and resumes else 0
                if begin >= len(content):
                    self.send_error(416)
                    return
                self.send_response(206 if begin else 200)
                self.send_header("Content-Length", str(len(content) - begin))
                self.end_headers()
                breaks = name in mirror.broken
                mirror.broken.discard(name)
                with contextlib.suppress(OSError):
                    self.wfile.write(content[begin : len(content) // 2 if breaks else None])

            def log_message(self, *arguments):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        serve = {"target": self.server.serve_forever, "kwargs": {"poll_interval": 0.01}}
        threading.Thread(**serve, daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}/"


@contextlib.contextmanager
def mirror(*options):
    """A Mirror that is stopped at the end of the block."""
    one = Mirror(*options)
    try:
        yield one
    finally:
        one.server.shutdown()
        one.server.server_close()
