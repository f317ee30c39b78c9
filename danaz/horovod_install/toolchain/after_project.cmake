# Horovod 0.28.1 asks for C++14; the headers of today's torch are C++20. CMAKE_CXX_STANDARD is set in Horovod's own lists, so
# the flag which that standard stands for is changed instead.
foreach(standard IN ITEMS 11 14 17)
    set(CMAKE_CXX${standard}_STANDARD_COMPILE_OPTION "-std=c++20")
    set(CMAKE_CXX${standard}_EXTENSION_COMPILE_OPTION "-std=gnu++20")
endforeach()

# Gloo's process sets listen on the address of gethostname(), not on HOROVOD_GLOO_IFACE. See the header.
string(APPEND CMAKE_CXX_FLAGS " -include \"${CMAKE_CURRENT_LIST_DIR}/gethostname.h\"")
