require("attackmodule");
