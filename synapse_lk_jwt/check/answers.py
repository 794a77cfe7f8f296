# SPDX-License-Identifier: Apache-2.0
"""Describes the problems of an answer that a browser would get."""

from synapse_lk_jwt.check.probe import Answer

PROXY = "the reverse proxy's configuration (nginx; others in docs/reverse-proxy.md)"
CORS = "Access-Control-Allow-Origin"

CORS_LINES = (
    f"# remove every line such as 'add_header {CORS} …' for the paths of Synapse,",
    "# which sends this header itself, and forward OPTIONS to Synapse",
)


def describe(answer: Answer) -> str:
    """The kind of an answer, without quoting it."""
    if answer.is_html:
        return f"with a web page ({answer.status})"
    content = answer.json
    if isinstance(content, dict) and isinstance(content.get("errcode"), str):
        return f"with {answer.status} {content['errcode'][:40]}"
    return f"with {answer.status}"


def cors_problem(answer: Answer, origin: str = "*") -> str | None:
    """What makes a browser block an answer; None if nothing does."""
    values = answer.all(CORS)
    if not values:
        return f"is answered without {CORS}, so browsers block it (CORS)"
    if values not in (["*"], [origin]):
        shown = ", ".join(values)[:200]
        return f"is answered with {CORS}: {shown} instead of one *, so browsers block it (CORS)"
    return None
