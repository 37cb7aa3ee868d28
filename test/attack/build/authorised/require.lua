require("attackmodule")
