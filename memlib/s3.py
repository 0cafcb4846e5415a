"""Object stores that speak S3: a URI and the usual AWS variables in, a file system out.

`s3://BUCKET/FOLDER?endpoint_override=HOST:PORT&scheme=http&region=REGION`; what the URI leaves out is
read from AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL and from AWS_REGION or AWS_DEFAULT_REGION.
Credentials come from where every AWS tool looks for them, never from the URI, which is printed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from urllib.parse import parse_qsl, urlencode, urlsplit

from pyarrow import fs

from memlib.errors import InputError, unknown

SCHEME = "s3"
OPTIONS = ("endpoint_override", "scheme", "region")
CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 10.0  # without a byte
# What waiting does not mend, as pyarrow names it in its messages.
FINAL = ("ACCESS_DENIED", "NO_SUCH_BUCKET", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH", "INVALID_CLIENT_TOKEN")


def open_s3(uri: str, environment: Mapping[str, str] = os.environ) -> tuple[fs.S3FileSystem, str, str]:
    """Return the file system, the folder in it (BUCKET/FOLDER) and the URI with everything another process needs.

    Raises:
        InputError: the URI has no bucket, holds credentials or an option that is not known.
        OSError: no endpoint is given, and AWS does not know the bucket's region.
    """
    parts = urlsplit(uri)
    if "@" in parts.netloc:
        raise InputError(
            f"location s3://...@{parts.netloc.rpartition('@')[2]} holds credentials, and locations are printed and "
            "stored; put them into AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or ~/.aws/credentials."
        )
    options = dict(parse_qsl(parts.query))
    for option in options:
        if option not in OPTIONS:
            raise unknown(f"option in {uri!r}", option, OPTIONS)
    if not parts.netloc:
        raise InputError(f"location {uri!r} names no bucket; give s3://BUCKET/FOLDER.")
    options = {**_from_environment(environment), **options}
    root = f"{parts.netloc}{parts.path}".rstrip("/")
    if "region" not in options:
        options["region"] = "us-east-1" if "endpoint_override" in options else fs.resolve_s3_region(parts.netloc)
    filesystem = fs.S3FileSystem(
        region=options["region"],
        scheme=options.get("scheme", "https"),
        endpoint_override=options.get("endpoint_override"),
        connect_timeout=CONNECT_SECONDS,
        request_timeout=ANSWER_SECONDS,
        allow_delayed_open=True,  # one PUT a small file, instead of the three requests of an upload in parts
    )
    return filesystem, root, f"{SCHEME}://{root}?{urlencode(options, safe=':')}"


def is_final(error: OSError) -> bool:
    """Return whether an object store's answer will be the same however often it is asked."""
    return any(code in str(error) for code in FINAL)


def _from_environment(environment: Mapping[str, str]) -> dict[str, str]:
    endpoint = environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL")
    region = environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION")
    options = {"region": region} if region else {}
    if endpoint:
        scheme, separator, host = endpoint.rpartition("://")
        options |= {"endpoint_override": host.rstrip("/"), "scheme": scheme if separator else "https"}
    return options
