"""How libtorrent is set up, and why."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import libtorrent as lt

Address = tuple[str, int]


@dataclass(frozen=True)
class Task:
    """What a worker is to do, as it is told in its first line.

    Parameters
    ----------
    torrent
        Path or magnet link.
    save, state
        Folders of the data and of what is remembered of it.
    parent
        Process without which the worker ends.
    whole
        Whether all pieces are wanted from the start; else those asked for.
    trust
        Whether to believe what is remembered; else files are hashed first.
    info_hash
        Expected, in hexadecimal digits.
    peers, web_seeds
        Known beforehand: addresses, URLs.
    private
        Talk to those alone: no tracker, no discovery, and listen on 127.0.0.1 only.
    download_limit, upload_limit
        Bytes a second, 0 for none.
    port
        To listen on; 0 for any.
    """

    torrent: str
    save: str
    state: str
    parent: int
    whole: bool = False
    trust: bool = True
    info_hash: str | None = None
    peers: tuple[Address, ...] = ()
    web_seeds: tuple[str, ...] = ()
    private: bool = False
    download_limit: int = 0
    upload_limit: int = 0
    port: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Itself as JSON takes it."""
        return asdict(self)


def session_settings(task: Task) -> dict[str, Any]:
    """Settings of the session."""
    everywhere = f"0.0.0.0:{task.port},[::]:{task.port}"
    category = lt.alert_category
    return {
        # Whoever names a port means that one.
        "max_retry_port_bind": 0 if task.port else 10,
        "listen_system_port_fallback": not task.port,
        "listen_interfaces": f"127.0.0.1:{task.port}" if task.private else everywhere,
        **dict.fromkeys(
            ("enable_dht", "enable_lsd", "enable_upnp", "enable_natpmp"), not task.private
        ),
        # Several peers of a test share one address; elsewhere that is how swarms are abused.
        "allow_multiple_connections_per_ip": task.private,
        "alert_mask": category.error | category.status | category.storage | category.piece_progress,
        "alert_queue_size": 100_000,  # at 2000, alerts of small pieces are dropped
        "user_agent": f"synthbrain libtorrent/{lt.__version__}",
        **_TRANSPORT,
        **_PATIENCE,
        **_DISK,
    }


_TRANSPORT = {
    # libtorrent tries uTP first. A peer without it (aria2) is asked for seconds before TCP is
    # tried: 600 MB on loopback took 7.3 s rather than 2.3 s. One with it (Transmission) gives
    # half as much by uTP as by TCP, see benchmarks/torrent.md.
    "enable_outgoing_utp": False,
    "mixed_mode_algorithm": 0,  # prefer TCP: uTP peers that come in must not throttle it
    # 500 blocks of 16 KiB are on the way at most: 8 MB, less than a fast long line holds.
    "max_out_request_queue": 1500,
    "request_queue_time": 3,
    "send_buffer_watermark": 4 << 20,
    "send_buffer_low_watermark": 256 << 10,
    # Between two reads nothing is wanted; peers must still be there for the next.
    "close_redundant_connections": False,
    "connection_speed": 100,
    "smooth_connects": False,
}

_PATIENCE = {
    # A source that stalls or lies must not hold up the others: 60 to 120 s by default.
    "peer_timeout": 60,
    "request_timeout": 15,
    "piece_timeout": 10,
    "handshake_timeout": 10,
    "peer_connect_timeout": 7,
    "min_reconnect_time": 5,
    "max_failcount": 5,
    "urlseed_timeout": 10,
    "urlseed_wait_retry": 10,
    "urlseed_max_request_bytes": 4 << 20,
    "ban_web_seeds": True,
    "stop_tracker_timeout": 1,
    "max_metadata_size": 64 << 20,
    "tick_interval": 100,
}

_DISK = {
    "disk_write_mode": 0,  # pwrite: a full disk is then an error, not a SIGBUS of a mapping
    "aio_threads": 4,
    "hashing_threads": 2,
    "max_queued_disk_bytes": 64 << 20,
    "file_pool_size": 100,
    "no_atime_storage": True,
}
