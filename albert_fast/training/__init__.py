"""What every training run is made of, whatever it trains: optimizer, schedules, processes, checkpoints, records."""
