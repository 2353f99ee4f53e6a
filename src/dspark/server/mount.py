"""The page and the metrics on an app: GET /, /metrics, /metrics.json."""

import base64
import hashlib
import re
from importlib import resources

from fastapi import FastAPI, Response
from fastapi.responses import HTMLResponse
from prometheus_client import CONTENT_TYPE_LATEST

from dspark.server.metrics import Metrics


def page() -> str:
    return (resources.files("dspark.server") / "page.html").read_text(encoding="utf-8")


def policy(html: str) -> str:
    """A Content-Security-Policy under which this page's own style and script run, and nothing else: no other script, no
    connection but to the server it came from."""

    def hashes(tag: str) -> str:
        bodies = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()}'" for body in bodies)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def mount(app: FastAPI, metrics: Metrics) -> None:
    """Add the page, Prometheus text and the page's JSON."""
    html = page()
    headers = {
        "Content-Security-Policy": policy(html),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }

    @app.get("/", include_in_schema=False)
    def show_page() -> HTMLResponse:
        return HTMLResponse(html, headers=headers)

    @app.get("/metrics", include_in_schema=False)
    def show_metrics() -> Response:
        return Response(metrics.render(), media_type=CONTENT_TYPE_LATEST, headers={"Cache-Control": "no-store"})

    @app.get("/metrics.json", include_in_schema=False)
    def show_snapshot() -> dict:
        """For the page, which reads it once a second."""
        return metrics.snapshot()
