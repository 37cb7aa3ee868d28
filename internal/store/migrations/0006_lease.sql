-- Who may run a loop that must run once in the fleet. The fence grows with every
-- new holder, and rows are never deleted, so that no number comes twice.
CREATE TABLE lease (
	name     @KEY PRIMARY KEY,
	owner    TEXT NOT NULL,
	until_us BIGINT NOT NULL,
	fence    BIGINT NOT NULL
);
