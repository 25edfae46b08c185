"""On the path of every Python client: nothing but this machine may be reached, so that a test that
would need the open network fails here too."""

import ipaddress
import socket

_connect = socket.socket.connect
_getaddrinfo = socket.getaddrinfo


def _is_local(host):
    if host in (None, "", "localhost", b"localhost"):
        return True
    try:
        return ipaddress.ip_address(host if isinstance(host, str) else host.decode()).is_loopback
    except ValueError:
        return False


def connect(self, address):
    if isinstance(address, tuple) and not _is_local(address[0]):
        raise OSError(f"{address[0]} is not on this machine")
    return _connect(self, address)


def getaddrinfo(host, *arguments, **options):
    if not _is_local(host):
        raise socket.gaierror(f"{host} is not on this machine")
    return _getaddrinfo(host, *arguments, **options)


socket.socket.connect = connect
socket.getaddrinfo = getaddrinfo
