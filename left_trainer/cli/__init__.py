"""The command line: `left-trainer`, one module per subcommand."""
