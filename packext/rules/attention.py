"""`F.multi_head_attention_forward` needs no rule: it is followed into its linear maps and products.

The tracer runs functions of torch's functional modules that are written in Python with their own
dispatch switched off (see `_calls.transparent`), so that in-projection, attention and out-projection
are seen as the torch functions that they are.
"""
