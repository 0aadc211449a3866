"""`from_pretrained` that refuses weights which do not fit; diffusers itself only warns of them."""

from typing import Any


class StrictLoadingMixin:
    """Mixin whose `from_pretrained` refuses missing and unused weights. Put it before `ModelMixin`."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs) -> Any:
        """As diffusers' `ModelMixin.from_pretrained`, with the same arguments.

        With `output_loading_info=True`, which also returns the keys that do not fit, the caller has to check them.
        FlashPack files are not checked: their loader does not report keys.

        Raises: ValueError: the weights have keys that are missing, unknown or, unless `ignore_mismatched_sizes` allows
            it, of another shape. OSError: a file that is missing or cannot be read.
        """
        if kwargs.get("output_loading_info") or kwargs.get("use_flashpack"):
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        try:
            model, found = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        except (RuntimeError, TypeError) as error:
            # TypeError: from a constructor, for an invalid value in config.json
            if isinstance(error, RuntimeError) and "size mismatch" not in str(error):
                raise
            raise ValueError(f"{pretrained_model_name_or_path} does not fit {cls.__name__}: {error}") from error
        fused = ".to_qkv."  # `fuse_qkv_projections` adds what it joins
        unexpected = [key for key in found["unexpected_keys"] if fused not in key]
        wrong = {"missing": found["missing_keys"], "unexpected": unexpected}
        if problems := [f"{kind} keys {sorted(keys)}" for kind, keys in wrong.items() if keys]:
            raise ValueError(f"{pretrained_model_name_or_path} does not fit {cls.__name__}: {'; '.join(problems)}.")
        return model
