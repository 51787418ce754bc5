"""The links of a device, as plans are made with them."""

from __future__ import annotations

from tapeline.cost.catalogue import Device
from tapeline.planner.route import Links

_LINK_SHARE = 0.9


def links_of(device: Device) -> Links:
    """The links of a device, a tenth slower than they are: too fast in the plan costs much more than too slow."""
    return Links(
        to_host=_LINK_SHARE * device.device_to_host_bandwidth,
        to_device=_LINK_SHARE * device.host_to_device_bandwidth,
        both=device.duplex_factor,
        latency=device.copy_seconds,
        disk_write=_LINK_SHARE * device.disk_write_bandwidth,
        disk_read=_LINK_SHARE * device.disk_read_bandwidth,
    )
