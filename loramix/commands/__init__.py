"""The commands of ``loramix``, one file each: they parse options, call one function and print."""
