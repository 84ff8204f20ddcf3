"""What every command runs on: distributed processes, signals, the watchdog, atomic files, the command line, the console."""
