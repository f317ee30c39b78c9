"""How large a frame may be. This module imports nothing, so that the server can bind its socket before slow imports."""

MAX_FRAME_BYTES = (3 << 19) + 1024  # the largest header, encrypted; a slice takes 1 MB, or 1.3 MB in its codec
