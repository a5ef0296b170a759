"""What is made once and kept in ``ALIGN_CACHE``: exports, engines, calibrations, scores, drawn images, ...

An artefact is an entry, ``entries/KIND/NAME-DIGEST-DIGEST``: a folder with the payload and `alignment.cache.entry`'s
``entry.json``, which says what it is.  The digests are of what went in and of what made it, so that an entry is never
changed, only made, found to be sound, refused, and removed.

Producers see `kept`, `value`, `resumable` and `until_done`; `alignment.cache.room` says what lies there and makes room.
"""

from alignment.cache.entry import Key, digest_of
from alignment.cache.keep import discard, holding, kept, resumable, until_done, value

__all__ = ["Key", "digest_of", "discard", "holding", "kept", "resumable", "until_done", "value"]
