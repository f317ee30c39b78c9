"""How large a frame may be. Imports nothing, so that the server's socket is bound before the slow imports begin."""

MAX_FRAME_BYTES = (3 << 19) + 1024  # the largest header, encrypted; a slice takes 1 MB, or 1.3 MB in its codec
