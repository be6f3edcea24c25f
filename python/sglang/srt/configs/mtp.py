"""What config.json says of the layers that predict tokens past the next one (MTP)."""

from __future__ import annotations


def mtp_count_refusal(key: str, count: int) -> str:
    """Why a checkpoint whose ``key`` says ``count`` MTP layers cannot draft; "" if it can."""
    if count == 1:
        return ""
    if count == 0:
        return f"the checkpoint has no MTP layer (key {key} is 0 or missing)"
    return f"key {key} is {count}: drafts come from one MTP layer, and chains of several layers are not supported"
