"""The recipe of the miniature's text: Debian's documentation packages to English prose, see docs/softpick/MINIATURE_DATA.md."""
