"""Operators of metala_vision: one folder each, with a reference, a portable form and an api.

A public function is imported from its folder, as in
`from metala_vision.kernels.gated_linear_attention import gated_linear_attention`: exported here
under the same name, it would hide the folder.
"""

if __name__ != "metala_vision.kernels":
    # The folder also lies at the root of a checkout. Imported from there it would be a second copy
    # of every module (and of every registered operator), so the bare name is refused.
    raise ImportError(
        f"this folder was imported as {__name__!r}; import it as 'metala_vision.kernels' "
        "(if you meant another package called 'kernels', run outside this folder)"
    )
