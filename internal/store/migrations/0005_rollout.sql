-- What a rollout remembers of its hosts.
CREATE TABLE rollout_host (
	rollout     @KEY NOT NULL,    -- key of its document
	host        @KEY NOT NULL,
	ring        BIGINT NOT NULL,
	entered_us  BIGINT NOT NULL,  -- 0: not yet, here and below
	admitted_us BIGINT NOT NULL,
	applied_us  BIGINT NOT NULL,
	base        TEXT NOT NULL,    -- JSON: how it stood when it entered
	PRIMARY KEY (rollout, host)
);

-- The first time that a signal was seen on a host of a rollout.
CREATE TABLE rollout_hit (
	rollout @KEY NOT NULL,
	host    @KEY NOT NULL,
	signal  @KEY NOT NULL,
	at_us   BIGINT NOT NULL,
	text    TEXT NOT NULL,
	PRIMARY KEY (rollout, host, signal)
);
