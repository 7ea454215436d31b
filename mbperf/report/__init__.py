"""From saved runs to tables, pictures and one page: no clock is read here and nothing is measured."""
