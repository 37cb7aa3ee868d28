-- Who may run a loop that must run once in the fleet. The fence grows with every
-- new holder, and rows are never deleted, so that no number comes twice.
CREATE TABLE lease (
	name     @KEY PRIMARY KEY,
	owner    TEXT NOT NULL,
	until_us BIGINT NOT NULL,
	fence    BIGINT NOT NULL
);

-- How far somebody elsewhere has been told of the audit log.
CREATE TABLE outbox (
	name     @KEY PRIMARY KEY,
	position BIGINT NOT NULL, -- the record that was told last
	state    TEXT NOT NULL,
	at_us    BIGINT NOT NULL
);
