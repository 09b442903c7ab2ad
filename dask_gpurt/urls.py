"""URLs in which there may be a password: how they are shown, and how it is kept out of what others say. Pure.

Covers: :func:`shown`, :class:`Veil`.
See also: :mod:`dask_gpurt.memory.objects`, whose URL is the only one.

A password has no need to stand in a URL: file systems of fsspec read theirs from their own configuration. Where it does
all the same, it stands in what the file system makes of the URL, and in its errors, too.
"""

from __future__ import annotations

import re
from urllib.parse import unquote

__all__ = ["Veil", "shown"]

#: What stands for something that is not shown.
_VEIL = "***"
#: Of ``user:password@`` behind ``://``, or where that was forgotten, and of ``name=value`` behind ``?``.
_USER = re.compile(r"(?:(?<=://)|^)[^/?#]*@")
_QUERY = re.compile(r"[?#].*", re.DOTALL)
_VALUE = re.compile(r"[=&?#;]")
#: Shorter ones would be found in any text.
_SECRET_LENGTH_MIN = 3


def shown(url: str) -> str:
    """Return a URL without what may be secret in it: user and password, and the query.

    Examples
    --------
    >>> shown("ftp://me:secret@host/folder"), shown("https://host/folder?signature=secret"), shown("s3://bucket/a@b")
    ('ftp://***@host/folder', 'https://host/folder?***', 's3://bucket/a@b')
    """
    return _QUERY.sub("?" + _VEIL, _USER.sub(_VEIL + "@", url), count=1)


class Veil:
    """Keeps what is secret in a URL out of texts.

    Parameters
    ----------
    url
        The URL.

    Examples
    --------
    >>> veil = Veil("s3://key:pass%20word@bucket/folder?token=abcd")
    >>> veil("Invalid bucket name 'key:pass%20word@bucket'"), veil("401: pass word, abcd")
    ("Invalid bucket name '***@bucket'", '401: ***, ***')
    """

    def __init__(self, url: str) -> None:
        users = [user[:-1] for user in _USER.findall(url)]
        query = _QUERY.search(url)
        parts = [part for user in users for part in (user, user.partition(":")[2])]
        parts += [] if query is None else [query[0][1:], *_VALUE.split(query[0])]
        every = {form for part in parts for form in (part, unquote(part)) if len(form) >= _SECRET_LENGTH_MIN}
        # The longest first: it may have another within.
        self._secrets = sorted(every, key=len, reverse=True)

    def __bool__(self) -> bool:
        return bool(self._secrets)

    def __call__(self, text: str) -> str:
        """Return ``text`` without them."""
        for secret in self._secrets:
            text = text.replace(secret, _VEIL)
        return text
