"""A slow network on one machine: processes in network namespaces of their own, and a relay that delays their packets.

Linux and root only. Many kernels lack `netem`, so packets leave each namespace through a TUN device, and a thread of
this process hands them on: after what its bandwidth needs, and the latency. All above that is the kernel's TCP.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import os
import select
import struct
import subprocess
import threading
import time
from types import TracebackType

TUNSETIFF, NO_HEADER_TUN = 0x400454CA, 0x1001
#: Bytes in a packet: large, to keep their number down.
MTU = 16000


class Network:
    """Namespaces that are all connected with each other.

    Attributes:
        latency: seconds from each to each, one way.
        bandwidth: bytes a second that leave each; 0 for no limit.
        sent: bytes that have left each, headers of IP and TCP included.
    """

    def __init__(self, size: int) -> None:
        self.names = [f"px{os.getpid()}n{k}" for k in range(size)]
        self.addresses = [f"10.77.0.{k + 1}" for k in range(size)]
        self.latency = self.bandwidth = 0.0
        self.sent = [0] * size
        self._open = True

    def __enter__(self) -> Network:
        for name in self.names:
            subprocess.run(["ip", "netns", "add", name], check=True)
        self._devices = [self._device(n, a) for n, a in zip(self.names, self.addresses, strict=True)]
        self._thread = threading.Thread(target=self._relay, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open = False
        self._thread.join()
        for device in self._devices:
            os.close(device)
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=True)

    def start(self, k: int, command: list[str]) -> subprocess.Popen[str]:
        """A process in namespace k, which talks over its standard input and output."""
        inside = ["ip", "netns", "exec", self.names[k], *command]
        return subprocess.Popen(inside, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def _device(self, name: str, address: str) -> int:
        """A TUN device in a namespace, which this thread enters for the moment."""
        libc = ctypes.CDLL(None, use_errno=True)
        own, there = os.open("/proc/self/ns/net", os.O_RDONLY), os.open(f"/var/run/netns/{name}", os.O_RDONLY)
        try:
            if libc.setns(there, 0):
                raise OSError(ctypes.get_errno(), f"setns to {name}")
            device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH", b"tun0", NO_HEADER_TUN))
            for line in (
                f"ip addr add {address}/24 dev tun0",
                f"ip link set tun0 mtu {MTU} txqueuelen 10000 up",
                "ip link set lo up",
            ):
                subprocess.run(line.split(), check=True)
        finally:
            libc.setns(own, 0)
            os.close(own)
            os.close(there)
        return device

    def _relay(self) -> None:
        waiting: list[tuple[float, int, int, bytes]] = []
        free, count = [0.0] * len(self._devices), 0
        while self._open:
            now = time.monotonic()
            while waiting and waiting[0][0] <= now:
                *_, to, packet = heapq.heappop(waiting)
                os.write(self._devices[to], packet)
            patience = min(0.05, max(0.0, waiting[0][0] - now)) if waiting else 0.05
            for device in select.select(self._devices, [], [], patience)[0]:
                packet = os.read(device, 65536)
                to = packet[19] - 1
                if packet[0] >> 4 != 4 or not 0 <= to < len(self._devices):
                    continue  # not a packet for one of the namespaces
                source = self._devices.index(device)
                count += 1
                self.sent[source] += len(packet)
                leaves = max(time.monotonic(), free[source])
                free[source] = leaves + (len(packet) / self.bandwidth if self.bandwidth else 0.0)
                heapq.heappush(waiting, (free[source] + self.latency, count, to, packet))
