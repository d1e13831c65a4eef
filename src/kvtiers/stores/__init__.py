"""Where sealed parts lie: one file or folder per engine, each a `RecordStore`; `guard` puts deadline, breaker and retry around any."""
