"""Decoder language models as pure functions over nested dicts of stacked arrays. Import as `aif.models`."""

if __name__ != "aif.models":
    raise ImportError("this package is imported as aif.models; a second name would load every class twice")
