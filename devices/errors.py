"""Errors of devices, each with the value, the reason and the remedy."""

from devices.text import printable

#: Characters of a problem, which may quote what a device printed.
_LONGEST = 600


class DeviceError(Exception):
    """Base: the message reads ``subject: what is wrong. Remedy.``

    It may quote a device, so it is made printable and is cut off where it is too long.
    """

    def __init__(self, subject: object, problem: str, remedy: str = "") -> None:
        self.subject, self.problem = printable(str(subject)), printable(problem, _LONGEST)
        self.remedy = printable(remedy, _LONGEST)
        end = f" {self.remedy}." if remedy else ""
        super().__init__(f"{self.subject}: {self.problem}.{end}")


class BadDeviceError(DeviceError):
    """The user named a device, engine or file that cannot be used."""


class UnreachableError(DeviceError):
    """The device refuses the connection, or nothing answers."""


class DeviceLostError(DeviceError):
    """The connection ended before the command did."""


class DeviceTimeoutError(DeviceError):
    """The command took too long; it is no longer running unless the message says so."""


class CommandFailedError(DeviceError):
    """A command on the device ended with another code than 0."""
