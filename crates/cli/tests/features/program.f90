! A program with Fortran's runtime, and a variable of which every thread has its own.
module counters
  integer, save :: counter = 3
  !$omp threadprivate(counter)
end module

program main
  use counters
  real(8) :: numbers(4)
  character(len=20) :: text
  numbers = [1d0, 4d0, 9d0, 16d0]
  counter = counter + 1
  write (text, '(f6.2, i4)') sum(sqrt(numbers)), counter
  print '(a)', trim(text)
  print *, maxval(numbers), matmul(reshape(numbers, [2, 2]), [1d0, 1d0])
  stop 4
end program
