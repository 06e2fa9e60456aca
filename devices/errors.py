"""Errors of devices, each with the value, the reason and the remedy."""


class DeviceError(Exception):
    """Base: the message reads ``subject: what is wrong. Remedy.``"""

    def __init__(self, subject: object, problem: str, remedy: str = "") -> None:
        self.subject, self.problem, self.remedy = str(subject), problem, remedy
        super().__init__(f"{subject}: {problem}." + (f" {remedy}." if remedy else ""))


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
