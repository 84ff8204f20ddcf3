"""What every command uses: distributed processes, signals, the watchdog, atomic files, the command line."""
