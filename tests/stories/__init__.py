"""Stories of whole systems: processes, servers, kills, a browser."""
