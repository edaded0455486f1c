//! A fixed pool of threads that share the tasks of one op at a time.
