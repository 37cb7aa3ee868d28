-- What hosts report. On SQLite these tables of control.db stay empty: the same
-- ones are in files of their own, see events.go. Events themselves are in a table
-- a day, made when the day comes.
CREATE TABLE fleet_position (
	host   @KEY NOT NULL,
	lane   BIGINT NOT NULL,
	stream @BYTES NOT NULL,
	up_to  BIGINT NOT NULL,
	PRIMARY KEY (host, lane)
);

-- Batches of blocks that were stored and not handed on yet.
CREATE TABLE fleet_outbox (
	id    @KEY PRIMARY KEY, -- in the order of time
	node  @KEY NOT NULL,
	at_us BIGINT NOT NULL,
	body  @BYTES NOT NULL
);

CREATE TABLE fleet_item (
	id       @BYTES PRIMARY KEY, -- SHA-256 of the fields below, cut to 16 bytes
	sha256   @BYTES NOT NULL,
	kind     TEXT NOT NULL,
	path     TEXT NOT NULL,
	signer   TEXT NOT NULL,
	first_us BIGINT NOT NULL
);

-- Which host ran what.
CREATE TABLE fleet_seen (
	host     @BYTES NOT NULL, -- the 16 bytes of its id
	item     @BYTES NOT NULL,
	first_us BIGINT NOT NULL,
	last_us  BIGINT NOT NULL, -- to the hour
	PRIMARY KEY (host, item)
);

CREATE TABLE fleet_signal (
	id    @KEY PRIMARY KEY, -- in the order of time
	at_us BIGINT NOT NULL,
	host  @KEY NOT NULL,
	name  TEXT NOT NULL,
	text  TEXT NOT NULL
);
CREATE INDEX fleet_signal_at ON fleet_signal (at_us);
