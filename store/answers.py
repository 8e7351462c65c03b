"""What an error of any of fsspec's file systems means for the request: missing, forbidden, or worth another attempt."""

from typing import Literal

Verdict = Literal["missing", "exists", "denied", "refused", "unsupported", "again"]

PASSING = {408, 409, 425, 429}
"""besides 5xx: answers that another attempt may change"""
PASSING_CODES = {"RequestTimeout", "BadDigest", "IncompleteBody", "SlowDown",
                 "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch"}  # fmt: skip
"""S3's names for a body that did not arrive whole, some of which come as 400"""


def verdict_of(error: BaseException) -> Verdict:
    """What an error of any file system means for the request."""
    status, code = _answer(error)
    absent = isinstance(error, FileNotFoundError | NotADirectoryError)
    if status == 404 or (status is None and absent):
        return "missing"
    if status == 412 or (status is None and isinstance(error, FileExistsError)):
        return "exists"
    if status in (401, 403) or isinstance(error, PermissionError) or type(error).__name__ == "NoCredentialsError":
        return "denied"
    if status == 501:
        return "unsupported"
    if status is not None and status < 500 and status not in PASSING and code not in PASSING_CODES:
        return "refused"
    return "again"


def _answer(error: BaseException | None) -> tuple[int | None, str]:
    """HTTP status and S3's error code of the answer that an error tells of; (None, "") when there was none."""
    seen = 0
    while error is not None and seen < 8:
        response = getattr(error, "response", None)
        if isinstance(response, dict):  # botocore
            return response.get("ResponseMetadata", {}).get("HTTPStatusCode"), response.get("Error", {}).get("Code", "")
        for status in (getattr(response, "status_code", None), getattr(error, "status", None)):
            if isinstance(status, int):  # huggingface_hub; aiohttp
                return status, ""
        error, seen = error.__cause__, seen + 1
    return None, ""
