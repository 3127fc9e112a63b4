"""The words that scenes have written on them.

Short, common, and none of them the name of a thing, a colour, a size or a place, so that a caption
that quotes one says nothing about the objects.
"""

from __future__ import annotations

_TEXT = """
ahead again also april away begin best brave busy buy calm cheap clean clever come dance early
easy eight enter entry even exit fast fine forty free friday fun give good great happy hello
help here hope hurry july june keep kind later learn less lucky make march maybe monday more
much never new next nice nine noon north often only over past please plus proud push quick
quiet rent safe sale same save seven shop sing sixty slow smart soft south speak sunday
swim ten thanks think today true try twelve usual very visit wait walk warm welcome well west
wild win wise wish yet young zero
"""

WORDS = tuple(_TEXT.split())
"""Words for drawn text."""
